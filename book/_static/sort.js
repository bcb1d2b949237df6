// Tables of results sort by a click on a heading, Enter or Space: numbers by their first number, what was not run last.
document.addEventListener("DOMContentLoaded", () => {
  const number = (text) => {
    const found = text.replace(/,/g, "").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };
  for (const table of document.querySelectorAll("table.dataframe")) {
    const rows = [...table.querySelectorAll("thead tr")], body = table.tBodies[0];
    if (!rows.length || !body || body.rows.length < 3 || table.querySelector("[rowspan], [colspan]")) continue;
    const heads = [...rows[0].cells];
    if (body.rows[0].cells.length !== heads.length) continue;
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      head.style.cursor = "pointer";
      head.title = "sort";
      const sort = () => {
        const up = head.getAttribute("aria-sort") !== "ascending", lines = [...body.rows];
        const texts = new Map(lines.map((line) => [line, line.cells[column].textContent.trim()]));
        const numeric = column > 0 && lines.some((line) => !Number.isNaN(number(texts.get(line))));
        const known = (line) => (numeric ? !Number.isNaN(number(texts.get(line))) : texts.get(line) !== "");
        lines.sort((a, b) => {
          if (known(a) !== known(b)) return known(a) ? -1 : 1;
          if (!known(a)) return 0;
          const order = numeric ? number(texts.get(a)) - number(texts.get(b)) : texts.get(a).localeCompare(texts.get(b), "en", { numeric: true });
          return up ? order : -order;
        });
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        body.append(...lines);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();  // Space scrolls otherwise
        sort();
      });
    });
  }
});
