"""Style sheet of the page that `html.py` makes: light theme, dark theme and print."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --muted: #57606a; --grid: #dfe3e8; --soft: #f4f6f8;
  --warn: #8a4b00;
  --c0: #5c6773; --c1: #0072b2; --c2: #d55e00; --c3: #008f68;
  --c4: #b8588f; --c5: #b37700; --c6: #3d9ad1; --c7: #8a8000;
  --t0: #7f8c99; --t1: #33475b; --t2: #c2732f; --t3: transparent;
  --p1: #d3efe2; --p2: #b3e2ce; --p3: #92d4b9; --p4: #72c6a4; --p5: #55b78f; --p6: #3ca67c;
  --on: #10241c;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --ink: #e7eaee; --muted: #a4adb8; --grid: #333a44; --soft: #1d2229;
    --warn: #f0ae1f;
    --c0: #9aa5b1; --c1: #4a9fe0; --c2: #f07a30; --c3: #1fc496;
    --c4: #df8fbf; --c5: #f0ae1f; --c6: #a3dcff; --c7: #f0e442;
    --t0: #66717d; --t1: #b9c7d6; --t2: #d08a4f;
    --p1: #1f4738; --p2: #205442; --p3: #22624d; --p4: #247058; --p5: #267e63; --p6: #278364;
    --on: #ffffff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem clamp(0.75rem, 3vw, 2.5rem) 3rem; max-width: 82rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 0 0 0.35rem; overflow-wrap: anywhere; }
h3 { font-size: 0.95rem; line-height: 1.3; margin: 0.9rem 0 0; overflow-wrap: anywhere; }
p { margin: 0.35rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.notes { margin: 0.35rem 0; padding-left: 1.2rem; max-width: 46rem; color: var(--muted); }
header p, main > section > p { color: var(--muted); }
header p.headline { color: var(--ink); font-size: 1.1rem; }
header p.warning { color: var(--warn); border-left: 4px solid; padding-left: 0.6rem; }
section { margin-top: 2.5rem; }
.panels {
  display: grid; gap: 1.25rem 2rem; margin-top: 0.75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
}
figure { margin: 0; min-width: 0; max-width: 27rem; }
figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 0.25rem; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--ink); font-size: 11px; }
.chart .axis { fill: var(--muted); }
.chart .middle { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart .strong { font-weight: 600; }
.grid { stroke: var(--grid); fill: none; }
.reference { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 5 3; fill: none; }
.whisker { stroke: var(--ink); stroke-width: 1.3; fill: none; }
.bar { fill: currentColor; fill-opacity: 0.4; stroke: currentColor; }
.marker { fill: currentColor; }
.marker { stroke: var(--paper); stroke-width: 0.8; }
.hollow { fill: var(--paper); stroke: currentColor; stroke-width: 1.5; }
.line { stroke: currentColor; stroke-width: 2; fill: none; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.t0 { fill: var(--t0); } .t1 { fill: var(--t1); } .t2 { fill: var(--t2); }
.t3 { fill: var(--t3); stroke: var(--muted); stroke-dasharray: 3 2; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1.1rem; margin: 0.5rem 0 0; padding: 0;
  list-style: none; font-size: 0.875rem;
}
.legend li { display: flex; align-items: center; gap: 0.35rem; overflow-wrap: anywhere; }
.key { width: 24px; height: 14px; flex: none; }
details { margin-top: 0.75rem; }
summary { cursor: pointer; color: var(--muted); font-size: 0.875rem; }
.scroll { overflow-x: auto; margin-top: 0.5rem; }
table { border-collapse: collapse; font-size: 0.8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--grid); }
td { white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--muted); font-weight: 600; line-height: 1.25; }
thead th + th { min-width: 5.2rem; }
th:first-child { text-align: left; background: var(--paper); position: sticky; left: 0; }
tbody th { font-weight: 500; white-space: nowrap; }
#source tbody th { white-space: normal; }
#source th, #source td { text-align: left; }
#source td { white-space: normal; overflow-wrap: anywhere; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
.sample { max-width: 46rem; margin-top: 1rem; }
.text {
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 0.75rem 0.9rem; border-radius: 6px;
  background: var(--soft); font: 0.875rem/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, monospace;
}
.text .prompt { color: var(--muted); }
mark {
  color: var(--on); border-radius: 2px; padding: 0.1em 0; white-space: pre-wrap;
  print-color-adjust: exact;
}
.p1 { background: var(--p1); } .p2 { background: var(--p2); } .p3 { background: var(--p3); }
.p4 { background: var(--p4); } .p5 { background: var(--p5); } .p6 { background: var(--p6); }
@media (max-width: 40rem) {
  th, td { padding: 0.25rem 0.4rem; }
  thead th + th { min-width: 4.2rem; }
}
@page { margin: 14mm; }
@page wide { size: landscape; }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  section { margin-top: 1.5rem; }
  h2, h3, figcaption { break-after: avoid; }
  figure, tr, .legend { break-inside: avoid; }
  thead { display: table-header-group; }
  .panels { grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; }
  table { font-size: 7pt; }
  th, td { padding: 0.15rem 0.3rem; white-space: normal; }
  thead th + th { min-width: 0; }
  th:first-child { position: static; }
  .wide { page: wide; }
  .wide table { font-size: 6pt; }
  .wide td { white-space: nowrap; }
  .wide th, .wide td { padding: 0.15rem 0.2rem; }
  .text { background: none; border: 1px solid var(--grid); }
}
"""
