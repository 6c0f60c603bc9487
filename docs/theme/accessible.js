"use strict";
// Names and keyboard access for what the theme makes without them, some of it after a page is loaded.
(() => {
  const name = (selector, label) => document.querySelectorAll(selector).forEach((e, i) => {
    if (!e.hasAttribute("aria-label")) e.setAttribute("aria-label", i ? `${label} ${i + 1}` : label);
  });
  function improve() {
    name(".md-search", "Search");
    name("#__search", "Show the search");
    name("#__drawer", "Show the navigation");
    name(".md-code__nav", "Actions of code block");
    // Long lines and wide tables scroll, also by keys.
    document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach((e) => {
      if (!e.hasAttribute("tabindex")) e.setAttribute("tabindex", "0");
    });
  }
  improve();
  new MutationObserver(improve).observe(document.body, { childList: true, subtree: true });
})();
