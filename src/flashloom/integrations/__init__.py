"""flashloom as the attention of other libraries; each module is imported by name and needs its library."""
