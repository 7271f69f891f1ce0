"""The other front end: `torch.compile(model, backend="simba_fx")`. Read `backend` first."""

from simba_fx.frontends.dynamo.backend import simba_fx

__all__ = ["simba_fx"]
