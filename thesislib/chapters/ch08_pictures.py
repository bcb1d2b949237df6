"""Chapter 8's pictures of ideas: a small write that a later block makes large, and three parts of a task's items."""
