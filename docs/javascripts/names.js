// Names and flags in the text, of up to thirty letters, stay on one line.
for (const code of document.querySelectorAll("article :not(pre) > code")) {
  if (code.textContent.length <= 30) code.style.whiteSpace = "nowrap";
}
