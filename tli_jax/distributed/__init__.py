"""Where things lie: mesh and sharding rules, and the processes of a run."""
