"""Methods: which trainings are needed, and how they and a preference become a family. What stands where:

    baselines        reference, expert, uniform
    sweep            linear, adaptive, gradient, normalized, modpo
    utility_sweeps   tchebycheff, log-sum, max-min, lagrangian, product, warm-sweep
    linear_support   ols
    conditioned      conditioned, prompted
    experts          experts, mod-divergence, rmod, hidden-layer
    soups            ties, dare, bone-soup
    bridge           bridge
    extended         extended
    router           router
    placed           placed
    distilled        distilled
    emorl            emorl, emorl-shared
    calibrated       calibrated
    contextual       contextual, static-gates

`base` has what all share, `search` the searchers of mixing weights. The gate rules stand in `paretune.policy.rules`, the mixings in
`paretune.policy.mixing`.
"""
