"""The fast paths: each one function, tested against its definition in float64, gradients too.

Where there are several forms (attention), one place chooses and reports, and one form is the formula.
"""
