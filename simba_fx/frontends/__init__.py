"""Whose model it is, one file or folder per library: how a call is bound to a graph, and what comes back."""
