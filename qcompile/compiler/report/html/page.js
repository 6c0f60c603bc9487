"use strict";
// Without this script the page is complete but still: it adds search, filters, sorting and a theme.
(() => {
  const root = document.documentElement;

  function element(name, attributes = {}, text = "") {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  // ---- light and dark
  function theme() {
    const button = document.getElementById("theme");
    const system = window.matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      label();
    });
    system.addEventListener("change", label);
    label();
    button.hidden = false;
  }

  // ---- tables
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent;
  };

  const words = new Intl.Collator("en", { numeric: true });

  // Rows without a value come last in both directions.
  function order(column, numeric, sign) {
    return (a, b) => {
      const x = numeric ? a.cells[column].dataset.v : key(a, column);
      const y = numeric ? b.cells[column].dataset.v : key(b, column);
      if (!numeric) return sign * words.compare(x, y);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (Number(x) - Number(y));
    };
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.textContent) return;
      const numeric = head.dataset.kind === "number";
      const button = element("button", { type: "button" }, head.textContent);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === null ? (numeric ? "descending" : "ascending")
          : now === "ascending" ? "descending" : "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows].sort(order(column, numeric, sign));
        table.tBodies[0].append(...rows);
      });
      head.replaceChildren(button);
    });
  }

  function chooser(table, head, column, changed) {
    const values = [...new Set([...table.tBodies[0].rows].map((r) => key(r, column)))];
    if (values.length < 2) return null;
    const title = head.textContent;
    const select = element("select", { "aria-label": title });
    select.append(element("option", { value: "" }, `${title}: all`));
    values.sort(words.compare).forEach((v) => {
      select.append(element("option", { value: `=${v}` }, v || "none"));
    });
    select.addEventListener("change", changed);
    return { select, fits: (row) => !select.value || select.value === `=${key(row, column)}` };
  }

  function explorer(box) {
    const table = box.querySelector("table");
    const rows = [...table.tBodies[0].rows];
    const texts = new Map(rows.map((r) => [r, r.textContent.toLowerCase()]));
    const search = element("input", {
      type: "search", placeholder: "Search", "aria-label": `Search ${box.dataset.name}`,
    });
    const shownCount = element("output");
    const choosers = [];
    const heads = [...table.tHead.rows[0].cells];
    const apply = () => {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const fits = wanted.every((w) => texts.get(row).includes(w))
          && choosers.every((c) => c.fits(row));
        row.hidden = !fits;
        shown += fits;
      }
      shownCount.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
    };
    heads.forEach((head, column) => {
      if (head.dataset.choice === undefined) return;
      const made = chooser(table, head, column, apply);
      if (made) choosers.push(made);
    });
    const controls = element("div", { class: "controls" });
    controls.append(search, ...choosers.map((c) => c.select), shownCount);
    search.addEventListener("input", apply);
    box.prepend(controls);
    sortable(table);
    apply();
  }

  // ---- paper shows what is folded
  function printing() {
    let folded = [];
    window.addEventListener("beforeprint", () => {
      folded = [...document.querySelectorAll("details:not([open])")];
      folded.forEach((d) => { d.open = true; });
    });
    window.addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
  }

  theme();
  document.querySelectorAll(".explorer").forEach(explorer);
  printing();
  root.dataset.ready = "yes";
})();
