"""Figures, tables and theorems of the paper, one command each: `python -m examples.paper figure3 --small`.

`cli` has the commands. `settings` says what is run, `starts` and `sentiment` load models and pairs, `trainer` and
`registry` train each loss, `watch` measures on the way, and `lab` keeps what several figures draw from. `comparisons`
(Figures 1, 2, 5, 6), `styles` (3, 4), `cases` and `formulas` (Tables 1, 2) and `theorems` find; `claims` holds the
paper's statements against the numbers, `draw` and `page` write.
"""
