"""What the modules read, and the built-in figures. This file lets `import assets` find them."""
