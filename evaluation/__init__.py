"""Captions of a split, their scores, and the page that shows them."""
