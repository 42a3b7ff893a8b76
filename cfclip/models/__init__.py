"""Networks: one file each, shapes in comments, the equation cited."""
