// Comfort only: the page says everything without it.
"use strict";

const command = document.getElementById("command");
if (command) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  button.onclick = async () => {
    getSelection().selectAllChildren(command.firstChild);
    try {
      await navigator.clipboard.writeText(command.firstChild.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
  };
  const box = document.createElement("div");
  box.className = "command";
  command.before(box);
  box.append(command, button);
}

const value = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.value ?? cell.textContent.trim().replaceAll(",", "");
  return text === "" || isNaN(text) ? text : Number(text);
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.onclick = () => {
      const rising = head.ariaSort !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = rising ? "ascending" : "descending";
      const sign = rising ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
      });
      body.append(...rows);
    };
    head.replaceChildren(button);
  });
}
