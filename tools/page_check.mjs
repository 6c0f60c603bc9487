// Looks at pages in chromium for page_check.py: reads a job as JSON on stdin, prints JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const job = JSON.parse(readFileSync(0, "utf-8"));
const load = createRequire(`${job.modules}/`);
const { default: puppeteer } = await import(pathToFileURL(load.resolve("puppeteer-core")));
const axe = readFileSync(load.resolve("axe-core/axe.min.js"), "utf-8");

// Pairs of a fault of an open page and its place: violations of axe-core, scrolling sideways.
// Boxes that scroll on their own hold what is wider than they are.
async function faults() {
  const found = await window.axe.run(document, { resultTypes: ["violations"] });
  const lines = found.violations.map(({ id, help, nodes }) => {
    const [first] = nodes;
    const more = nodes.length > 1 ? `, and ${nodes.length - 1} more` : "";
    return [`axe ${id}: ${help}`, `${first.target.join(" ")}${more}`];
  });
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    const scrolls = (e) => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
    const wide = (e) => e.getBoundingClientRect().right > width + 1
      || (e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1 && !scrolls(e));
    const inside = (e) => e && e !== document.body && (scrolls(e) || inside(e.parentElement));
    const culprit = [...document.body.querySelectorAll("*")]
      .find((e) => wide(e) && !inside(e.parentElement) && ![...e.children].some(wide));
    const wanted = `${document.documentElement.scrollWidth} pixels`;
    lines.push(["scrolls sideways", culprit ? `${wanted}: ${culprit.outerHTML.slice(0, 80)}` : wanted]);
  }
  return lines;
}

async function look(browser, url, scheme, width) {
  const page = await browser.newPage();
  const complaints = [];
  page.on("console", (m) => ["error", "warn"].includes(m.type()) && complaints.push(m.text()));
  page.on("pageerror", (e) => complaints.push(e.message));
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.setViewport({ width, height: 900 });
  await page.goto(url, { waitUntil: "load", timeout: 120_000 });
  if (job.unfold) {
    await page.evaluate(() => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  }
  await page.evaluate(axe);
  const lines = await page.evaluate(faults);
  await page.close();
  return [...complaints.map((c) => ["complaint on the console", c]), ...lines];
}

// Pages of A4 in the PDF that the browser prints.
async function pagesOnPaper(browser, url) {
  const page = await browser.newPage();
  await page.goto(url, { waitUntil: "load", timeout: 120_000 });
  const pdf = Buffer.from(await page.pdf({ format: "A4", timeout: 120_000 })).toString("latin1");
  await page.close();
  return (pdf.match(/\/Type\s*\/Page\b(?!s)/g) ?? []).length;
}

const browser = await puppeteer.launch({
  executablePath: job.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--allow-file-access-from-files"],
});
const rows = [];
for (const url of job.urls) {
  for (const scheme of job.schemes) {
    for (const width of job.widths) {
      rows.push({ url, scheme, width, faults: await look(browser, url, scheme, width) });
    }
  }
  if (job.paper) rows.push({ url, paper: await pagesOnPaper(browser, url) });
}
await browser.close();
console.log(JSON.stringify(rows));
