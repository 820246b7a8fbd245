"""What others found about choosing entries, and what of it the accuracies of the page confirm."""

from benchmarks.render.tables import markdown

_ROWS = (
    (
        "Random Masking (Xu & Zhang, ICML 2024, [2405.02596](https://arxiv.org/abs/2405.02596))",
        "random entries match LoRA with fewer parameters, at learning rates larger than expected",
        "confirmed in kind: random entries are within the noise of LoRA, at rates far above those of full tuning",
    ),
    (
        "SPEFT (Liu et al., ACL 2025, [2412.13488](https://arxiv.org/abs/2412.13488))",
        "of many salience metrics simple ones of the gradient are reliable; masks that stay are as good as masks that move; "
        "sparse beats low-rank",
        "that a choice may stay is taken for granted here; the gradient's choice (GPS) is neither ahead of FPS nor behind "
        "it by more than chance",
    ),
    (
        "Super-Tuning ([2607.09287](https://arxiv.org/abs/2607.09287))",
        "the largest weights do as well as LoRA or better; with 8 B parameters they are ahead of a variant weighted by "
        "activations (79.0 to 78.7), whose score is the formula of Wanda and FPS: weight times size of the input",
        "not confirmed for one budget in every neuron, where magnitude is behind FPS; PEFT's Super-Tuning, which chooses by "
        "layer, is level with it",
    ),
    (
        "NeuroAda (Zhang et al., EMNLP 2025, [2510.18940](https://arxiv.org/abs/2510.18940))",
        "the largest weights of every neuron, beside frozen ones: 0.02 % of the parameters are enough on 23 language tasks",
        "the same budget is `PerNeuron(k)`, the same form `attach(..., beside=True)`, the same score `Magnitude`",
    ),
    (
        "LIFT (Liu et al., [2506.00772](https://arxiv.org/abs/2506.00772))",
        "the largest weights are a poor choice, the largest of a low-rank approximation a good one, ahead of full tuning",
        "that full tuning is behind sparse tuning on little data: confirmed; its score was not tried",
    ),
    (
        "S²FT (Yang et al., [2412.06289](https://arxiv.org/abs/2412.06289))",
        "some heads and channels, computed densely, are ahead of LoRA, and of full tuning where domains differ",
        "that few columns may carry a choice without loss is seen in the screening; whole rows or columns are not chosen",
    ),
)


def found_by_others() -> str:
    """The table, and what else is said about figures in the literature."""
    return "\n\n".join(
        [
            "What others found, and what of it these tables confirm (two data sets, a ViT-S, four epochs: small next to "
            "theirs):",
            markdown(["work", "what it found", "here"], _ROWS, left=3),
            "Means over VTAB-1k come in two kinds, which must not be mixed: over the means of its three groups (LoRA 74.9, "
            "SNELL 76.9), or over its nineteen tasks (72.6 and 74.6). This page has neither: each data set is by itself.",
        ]
    )
