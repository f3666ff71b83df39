"""Mixings: how a policy combines its adapters. Each is a `Policy` registered in MIXINGS.

    parameter   the exact soup W + sum_k g_k s_k B_k A_k, per row                         1 forward per token
    factor      (sum_k g_k B_k)(sum_k g_k A_k), as published for soups; one soup a batch  1 forward
    merged      TIES and DARE soups of the dense changes; one merge a batch               1 forward
    routed      the soup with gates per layer and token, from a learned router            1 forward
    tied        in training: the soup of adapters that share A and B, each with a core    1 forward
    logit       softmax of sum_k g_k log pi_k, token by token                             K forwards, in one stacked batch
    divergence  MOD's other means of the experts' distributions: harmonic, alpha, JS      K forwards (JS: K + 1)
    robust      the product of the experts at the worst-case weights, token by token      K forwards
    hidden      the model's own head on sum_k g_k h_k, h after the final norm             K forwards of the decoder, 1 of the head
    hidden-layer  states mixed below a layer of one's choice, the soup above              between 1 and K forwards
    prompted    one adapter; the gates are the preference, written before the prompt      1 forward
    reference   no adapter                                                                1 forward

The first five stand in `parameter`, the next three in `predictions`, the hidden ones in `hidden`.

K forwards are those of the layers from the lowest adapter on: what is below is the same for all experts and run once (see
`lora.decoder`). At g = e_k every mixing is expert k, except robust, merged where it drops entries, and prompted, which has no experts.
Hidden equals logit where the head is frozen, linear, without bias or soft cap: W sum g h = sum g W h; elsewhere no such claim. Gates that
are all 0 are the reference for soups, and the uniform policy where predictions or states are mixed.
"""
