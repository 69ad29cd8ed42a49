"""Device meshes and sharding rules, kernels that need a mesh, and the processes of a distributed run."""
