// Typesets formulas with MathJax, which `make docs` puts beside these files. Where it is missing, formulas stay as TeX.
const here = document.currentScript.src;

if (document.querySelector(".arithmatex")) {
  window.MathJax = {
    tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
    options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex", enableMenu: false },
    svg: { fontCache: "global" },
  };
  const script = document.createElement("script");
  script.src = new URL("../mathjax/tex-svg.js", here);
  script.async = true;
  document.head.append(script);
}
