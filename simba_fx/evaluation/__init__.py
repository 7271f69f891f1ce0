"""`simba-fx eval` and `simba-fx page`: what pruning costs in quality, on models and texts of the user's own.

    simba-fx eval examples/mamba-py-3m --text src/ --lengths 1024 4096 --criteria simba simba-l2/31 recent

Every rival is given the same windows of text, and is compared with the dense model window by window. In the order of
the story: `options` (what is asked), `texts` and `tasks` (what is read, what is searched), `rivals` (who is
compared), `records` (what has been measured: a run that was stopped goes on), `runner` (the loop), `statistics`,
`tables`, `plots` (what comes out); `page` is the second command, `calibration` makes a schedule of measurements.
"""
