"""Names and shapes that other libraries' users already have in their scripts."""
