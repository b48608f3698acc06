"""The two vocabularies: dimensions that parameters have, and axes that meshes have. They are disjoint."""

DIMENSIONS = ("experts", "expert_mlp", "mlp", "embed", "q_heads", "kv_heads", "vocab")
MESH_AXES = ("dp", "ep", "tp")

Axes = tuple[str, ...]
NONE: Axes = ()
EP: Axes = ("ep",)
TP: Axes = ("tp",)
EP_TP: Axes = ("ep", "tp")
