"""The style of the page: light and dark, wide and narrow."""

# Colours of the methods after Okabe and Ito, safe for colour blindness; darker on white and lighter on black, so that
# each has a contrast of at least 4.5 to its ground.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1e23; --soft: #5b626c; --line: #d9dde2; --card: #f6f7f9;
  --s1: #ad5200; --s2: #00815e; --s3: #0067ad; --s4: #a8447d; --s5: #7a6a00; --s6: #4d5663; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --text: #e8eaed; --soft: #a2a9b3; --line: #343942; --card: #1c1f25;
    --s1: #f0a04b; --s2: #35c79a; --s3: #62b4f5; --s4: #e59ac6; --s5: #d6c451; --s6: #aab3c0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h1, .note, th, dd { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.note { color: var(--soft); font-size: .9rem; margin: .7rem 0 0; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; min-width: 9rem; }
tbody th { font-weight: 500; white-space: normal; } td:last-child, thead th:last-child { padding-right: 0; }
.mark { width: 28px; height: 10px; margin-right: .35rem; vertical-align: middle; }
.mark path { fill: none; stroke-width: 3; }
figure { margin: 0; } .drawn { background: #fff; border-radius: .6rem; padding: 1rem; }
.drawn img { display: block; width: 100%; height: auto; }
.curves { background: var(--card); border-radius: .6rem; padding: 1rem; }
.curves svg { display: block; width: 100%; height: auto; } .curves .mark { display: inline; width: 28px; height: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin-bottom: .5rem; }
.narrow { display: none; }
.sheet { display: grid; grid-template-columns: repeat(var(--columns), minmax(3.2rem, 9rem)); gap: .7rem; }
.sheet b { align-self: end; font-size: clamp(.68rem, 2vw, .82rem); font-weight: 500; line-height: 1.25; }
.sheet b, .sheet figcaption { color: var(--soft); text-align: center; }
.sheet img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: .25rem; }
.sheet figcaption { font-size: clamp(.7rem, 2vw, .82rem); font-variant-numeric: tabular-nums; min-height: 1.5em; }
code { background: var(--card); padding: .15rem .4rem; border-radius: .3rem; font-size: .9rem;
  overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); padding: .7rem 0; } summary { cursor: pointer; font-weight: 500; }
dl { columns: 19rem; column-gap: 2.5rem; margin: .8rem 0 0; font-size: .88rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .25rem 0; break-inside: avoid; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { .roomy { display: none; } .narrow { display: block; } .curves { padding: .7rem .3rem; }
  main { padding-top: 1.5rem; } .sheet { gap: .3rem; } }
@media print { details > * { display: block; } }
"""
