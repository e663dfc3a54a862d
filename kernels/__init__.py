"""The Triton kernels: map of the folder. Kernels import torch, Triton and each other, nothing above them.

Equations and files
    S_t = diag(a_t) S_{t-1} + k_t u_tᵀ, y_t = S_tᵀ q_t; u is v, or corrected by the delta rule; S [K V]
        chunk_scan      algebra and notation; the records that its kernels take; what they share
        chunk_prepare   decay of chunks; decayed q and k; scores of chunks out of range; the triangular inverse
        chunk_forward   outputs and states; where segments begin, and with which states
        chunk_backward  gradients of states, then of q, k, v and gates
        rotate          complex gates: rotated q and k, and their backward pass
        scan            plan, launches, operators
    S_t = A_t ∘ S_{t-1} + k_t u_tᵀ, one gate per entry (Mamba, Longhorn); S [N V]
        elementwise     families, kernels, plan, launches, operators
    h_t = a_t h_{t-1} + x_t, one number per channel
        diagonal        kernel, plan, launches, operators
    one token of each of these, the state overwritten
        step            kernel, plan, operator
    around the scans
        conv            short causal convolution
        norm            skip, norm and gate
        pointwise       gate functions; sums over rows
        rotary          rotary positions
        loss            cross-entropy

Shared, in the order of imports
    cached      what follows from shapes alone, once per signature; needs neither torch nor Triton
    packing     documents of a packed row, torch alone: recur.primitives stands on these two
    operators   torch.library; what launches ask of a device
    tiles       loads and stores, places of chunks and segments, complex numbers
    decay       gates of a chunk and the decay they add up to
    lookback    decoupled look-back
    then rotate, chunk_scan, chunk_prepare, chunk_forward, chunk_backward, scan; the other files need no more than these

Words
    chunk       C tokens at a fixed place of a row, multiplied as matrices
    segment     consecutive chunks (or tokens) that one program scans with the state in registers
    border      the place between two segments of a row or document
    warm-up     chunks before a border from which a segment begins with zeros, because their gates forget the rest
    tile        the part of a tensor that a program holds; block: tokens or columns taken at once
    decay       product of gates: decay_in from the entry of a chunk, decay_out to its end, decay_total over all of it
    anchor      the point of a chunk from which key-wise decay is counted; in_range: whether that overflows nowhere
    A_qk, A_kk  decayed scores inside a chunk; A_solve: A_kk (1 + β A_kk)⁻¹, 1 − β A_solve the UT transform
    eraser      key under which the delta rule reads what it erases: k, or an erase key e
    phase       angle of a complex gate, a 32-bit fraction of a circle
    descriptor  what a program publishes for those that wait for it, see `lookback`
    slot        number of a chunk in tensors [chunks ...]; with packed documents some stay empty
    x_ptr       base pointer; x_ptrs a tile of pointers; x.q the pointer q of a record; offs_k offsets on axis K; dq the
                gradient of q. Capital letters are known when a program is compiled

To add a recurrence
    1. Write its token loop in recur/primitives: it is the definition, and laws compare the kernel with it in float64.
    2. One gate per entry: a gate and its gradients as two jitted functions, as SELECTIVE and ONLINE in `elementwise`.
       A matrix state: a field of `chunk_scan.Given` for each new tensor; `scan.Tensors` gets it too, and with it the
       schema, the fake operator and the slots of gradients.
    3. Its row in RULE of `step`.
    4. Rows of tests/specialisations.py: every pair of values is compiled, without a GPU, and hot ones must not spill.
"""
