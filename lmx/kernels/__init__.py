"""The fast paths: each one function, tested against what defines it, gradients too (attention, products and
cross-entropy in float64).

Where there are several forms (attention), one place chooses and reports, and one form is the formula.
"""
