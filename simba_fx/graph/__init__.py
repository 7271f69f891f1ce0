"""What passes ask of a captured graph, and how they are run. Read `facts` first."""
