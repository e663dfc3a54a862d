"""Pure functions on tensors: no parameters, no modules.

gated diagonal scan               gated_scan        diagonal.py
outer-product state expansion     outer_scan        outer.py, through scan
delta / online-learning update    delta_scan        delta.py, through scan; online_scan in elementwise.py
dense-hidden fusion               dense_fusion      hidden.py
complex gating                    complex_gate      gates.py
output gating                     output_gate       gates.py
"""
