"""`simba-fx bench`: how fast a sparse model is against its dense self and its peers, on the machine it runs on.

    simba-fx bench --model mamba-130m --lengths 1024 4096 --schedules linear "Linear(0.1, every=4)"
    simba-fx compile-modes --model mamba-130m

Nothing here is imported by `import simba_fx`; transformers, matplotlib and torch's compiler are imported when a command
needs them. In the order of the story: `options` and `models` (what is asked), `variants`, `peers`, `utrc` (what is
timed), `measure`, `parts`, `decoding` (how), `runner` (the loop), `results`, `tables`, `plots` (what comes out);
`compile_modes` and `compile_child` are the second command.
"""
