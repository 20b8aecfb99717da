"use strict";
// Tables of a report: a heading sorts, numbers as numbers.
const numberOf = (text) => { const found = /-?\d[\d.]*(e[-+]?\d+)?/i.exec(text.replace("−", "-")); return found ? Number(found[0]) : NaN; };
const inOrder = (one, other) => {
  const [a, b] = [numberOf(one), numberOf(other)];
  if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;  // what is no number comes last
  return isNaN(a) ? one.localeCompare(other) : a - b;
};
const made = (tag, attributes = {}, ...inside) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
};
function sortable(table) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) return;
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = made("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => inOrder(a.cells[column].textContent, b.cells[column].textContent));
      body.append(...(up ? rows : rows.reverse()));
    });
    head.append(button);
  }
}
document.querySelectorAll("table.told-table").forEach(sortable);
document.querySelectorAll("button[data-copy]").forEach((button) => button.addEventListener("click", async () => {
  const text = document.getElementById(button.dataset.copy).textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
  catch { getSelection().selectAllChildren(document.getElementById(button.dataset.copy)); }
}));
