// A click on a picture, or Enter, opens it as large as the window; another one, or Escape, closes it.
const dialog = document.createElement("dialog");
dialog.className = "large-picture";
dialog.addEventListener("click", () => dialog.close());
document.body.append(dialog);

for (const picture of document.querySelectorAll("article img")) {
  const link = document.createElement("a");
  link.href = picture.src;
  link.className = "opens-large";
  link.title = "Open large";
  picture.replaceWith(link);
  link.append(picture);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own
    event.preventDefault();
    const large = picture.cloneNode();
    large.removeAttribute("loading");
    dialog.replaceChildren(large);
    dialog.showModal();
  });
}
