"""From a model to one flat graph: `export` traces it, `lift` makes scans nodes, `normalise` and `blocks` tidy up."""
