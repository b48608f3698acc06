"""Parts that families are built from. No family names in here, and no meshes: parameters name their dimensions."""
