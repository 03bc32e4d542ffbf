"""Every fuzz target by name: what it is fed, what reads it, how it may end."""

from fuzz import Target
from fuzz_fetch import SERVERS, act_manifest, act_server, act_submission, manifests, submissions
from fuzz_hf import act_hf, hf_files
from fuzz_models import BOMBS, act_classifier, act_model, bin_files, classifier_files, model_files
from fuzz_shared import guarded, named
from fuzz_state import act_state, state_files
from fuzz_text import DATA, LABELS, act_data, act_labels, act_tokenizer, tokenizer_files

PROMPT_OUTPUTS = ("toy-dev-prompting-output.txt", "toy-test-prompting-output.txt")
FETCHED = ("root", "root/*")
TARGETS = {
    target.name: target
    for target in (
        Target(
            "data",
            named(DATA, "toy-dev.txt", "toy-test.txt"),
            guarded(act_data),
            outputs=("out.txt",),
            share=2,
        ),
        Target(
            "labels",
            named(LABELS, "labels.json"),
            guarded(act_labels),
            outputs=PROMPT_OUTPUTS,
            names=("label names", "question of"),
        ),
        Target("model", model_files(), guarded(act_model), names=("logits",), share=4),
        Target("bomb", BOMBS, guarded(act_model), share=0.25),
        Target("bin", bin_files(), guarded(act_model), names=("logits",), share=2),
        Target("classifier", classifier_files(), guarded(act_classifier)),
        Target(
            "state",
            state_files(),
            guarded(act_state),
            outputs=("run.state.pt",),
            names=("learning rate", "NaN or infinite"),
        ),
        Target("hf", hf_files(), guarded(act_hf), outputs=("out.pt",), names=(".: ",)),
        Target("tokenizer", tokenizer_files(), guarded(act_tokenizer), share=2),
        Target("submission", submissions(), act_submission, codes=(0, 1, 2)),
        Target(
            "manifest",
            manifests(),
            act_manifest,
            codes=(0, 1, 2, 3),
            outputs=FETCHED,
            names=("root", "a" * 300),  # or one of its own, which is too long
        ),
        Target(
            "server",
            SERVERS,
            act_server,
            codes=(0, 1, 3),
            outputs=(*FETCHED, "manifest.json"),
            share=0.5,
        ),
    )
}
