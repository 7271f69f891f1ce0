"""`python -m simba_fx.bench`: the same as `simba-fx`."""

from simba_fx.bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
