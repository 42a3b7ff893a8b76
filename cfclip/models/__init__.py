"""The networks, one file each, with shapes in comments and the paper of each equation cited."""
