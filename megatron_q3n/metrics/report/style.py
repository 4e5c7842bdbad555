"""Style sheet of the page: two columns (one on narrow screens), light and dark themes, chart color roles."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f6f6f3; --card: #ffffff; --ink: #22262b; --soft: #676d75; --grid: #e6e6e1;
  --c0: #2b6cb0; --c1: #c9621d; --c2: #2f8559; --c3: #7a58b5;
  --c4: #16828c; --c5: #c23b4b; --c6: #8a6d1f; --c7: #6b7280;
  --good: #2f8559; --bad: #c23b4b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e4e5e3; --soft: #9299a3; --grid: #2d3138;
    --c0: #6fa8e6; --c1: #ec9a58; --c2: #6cc495; --c3: #b397ea;
    --c4: #5cc3cd; --c5: #f07f8b; --c6: #d3b45c; --c7: #a3abb8;
    --good: #6cc495; --bad: #f07f8b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 64px; }
header h1 { margin: 0; font-size: 25px; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p { margin: 4px 0 22px; color: var(--soft); }
h2 {
  margin: 34px 0 12px; font-size: 13px; font-weight: 600; letter-spacing: 0.07em;
  text-transform: uppercase; color: var(--soft);
}
h3 { margin: 0; font-size: 15px; font-weight: 600; }
small { font-size: 12.5px; font-weight: 400; color: var(--soft); margin-left: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(134px, 1fr)); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
.tile { padding: 14px 16px; display: flex; flex-direction: column; gap: 2px; }
.tile:first-child { grid-column: span 2; }
.tile span { color: var(--soft); font-size: 13px; }
.tile strong { font-size: 23px; font-weight: 620; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.tile em { font-style: normal; font-size: 13px; color: var(--soft); min-height: 1.5em; }
.tile em.good { color: var(--good); }
.tile em.bad { color: var(--bad); }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.card { padding: 14px 16px 12px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 12px; margin-bottom: 8px; }
.right {
  margin-left: auto; display: flex; flex-wrap: wrap; justify-content: flex-end;
  gap: 2px 14px; align-items: baseline;
}
.value { font-variant-numeric: tabular-nums; font-weight: 600; }
.key { display: inline-flex; align-items: center; gap: 6px; font-size: 13px; color: var(--soft); }
.key b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key i { width: 12px; height: 3px; border-radius: 2px; }
.body svg { display: block; width: 100%; height: auto; }
.absent { color: var(--soft); margin: 6px 0 10px; }
.note { color: var(--soft); font-size: 13px; margin: 8px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 14px 5px 0; vertical-align: top; border-top: 1px solid var(--grid); }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.numbers td { white-space: nowrap; }
.numbers th { white-space: normal; }
pre {
  margin: 0; padding: 12px 14px; border-radius: 8px; background: var(--paper); overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
.sample + .sample { margin-top: 12px; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample b { color: var(--c0); font-weight: 600; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); font-size: 13.5px; }
details[open] summary { margin-bottom: 8px; }
@media (max-width: 820px) {
  main { padding: 20px 12px 40px; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .body:has(> svg) { overflow-x: auto; }
  .body svg { min-width: 340px; }
  .wide .body svg { min-width: 760px; }
}
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""
