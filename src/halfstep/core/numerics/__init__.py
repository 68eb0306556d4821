"""What the numbers of a run say: histograms of exponents, and what follows from them."""
