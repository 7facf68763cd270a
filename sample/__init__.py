"""A small world in Something-Something V2's layout, and two tiny models that know it."""
