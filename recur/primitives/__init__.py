"""Pure functions on tensors: no parameters, no modules.

gated diagonal scan               gated_scan        diagonal.py
outer-product state expansion     scan              scan.py; wide_step in reference.py, chunked_scan in chunked.py
delta / online-learning update    scan              the same, with erase; online_scan in elementwise.py
dense-hidden fusion               dense_fusion      hidden.py
complex gating                    complex_gate      gates.py
output gating                     output_gate       gates.py
"""
