"""Reading, cleaning, rendering and packing of conversations."""
