"""All checks: id, name, what a failure means, what to do about it, and the function that judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import attacks, network
from .evidence import Evidence
from .judging import Skip
from .values import Check, Verdict


@dataclass(frozen=True)
class Rule:
    """One row of the table; the fields are those of `Check`."""

    id: str
    name: str
    judge: Callable[[Evidence], Verdict]
    means: str
    remedy: str

    def check(self, evidence: Evidence) -> Check:
        """Judge."""
        try:
            found = self.judge(evidence)
        except Skip as reason:
            found = Verdict("SKIPPED", None, str(reason))
        return Check(found.status, found.value, found.message, found.where, self.id, self.name, self.means, self.remedy)


RULES = (
    Rule("ADV-001", "same answers", network.same_answers,
         "the network draws, so a gradient is that of another network than the one that answers",
         "switch the randomness off, or attack with `forward=eot(20)`"),
    Rule("ADV-002", "eval mode", network.eval_mode,
         "a figure measured in this mode would be of a network with dropout, or one that learns from the attacked images",
         "call `model.eval()` before anything is measured"),
    Rule("ADV-003", "finite answers", network.finite,
         "NaN compares as wrong or as right by accident, and no gradient comes from it",
         "repair the network; look for a division by 0 or an overflow in half precision"),
    Rule("ADV-004", "logits", network.not_probabilities,
         "the network ends in softmax, whose gradient vanishes where it is sure",
         "take the last softmax off"),
    Rule("ADV-005", "alone as in a batch", network.alone_as_together,
         "answers depend on the other images in the batch, as with batch norm without running statistics",
         "use batch norm with running statistics in eval mode"),
    Rule("ADV-006", "clean accuracy above chance", network.better_than_chance,
         "there is nothing to be robust: mostly wrong labels, or a normalisation that is not the network's",
         "check class order, mean and std"),
    Rule("ADV-010", "gradient of cross-entropy", network.gradient_under_cross_entropy,
         "attacks on cross-entropy stand still: logits far too large, or a step without a derivative",
         'attack with `loss="margin"` or `"dlr"`, and through `bpda` where the margin has none either'),
    Rule("ADV-011", "gradient of the margin", network.gradient_under_margin,
         "no gradient attack can follow anything: rounding, quantisation, or a detached tensor",
         "attack with `forward=bpda(twin)`, and with square"),
    Rule("ADV-012", "gradient is the slope", network.gradient_is_the_slope,
         "the gradient does not say where the answers go: rounding, or a backward pass of its own",
         "attack with `forward=bpda(twin)`, and with square"),
    Rule("ADV-020", "attacks ran", attacks.all_ran,
         "an attack that cannot run breaks nothing, which is no sign of robustness",
         "read the message; give a differentiable twin by `forward=bpda(twin)`"),
    Rule("ADV-021", "within eps", attacks.within_eps,
         "images are farther away than the threat model allows, mostly because eps is counted in normalised units",
         "count eps in pixels from 0 to 1, with the normalisation inside the network"),
    Rule("ADV-022", "within [0, 1]", attacks.within_pixels,
         "what the attack made are no images",
         "clip to [0, 1] after every step"),
    Rule("ADV-023", "survives 8 bit", attacks.survives_files,
         "success lies between the grey levels, and a file does not keep it",
         "quote the rates as stored beside those as returned"),
    Rule("ADV-024", "true labels", attacks.leaves_the_true_label,
         "the attack moves away from other labels than the true ones, so it repairs what was wrong or spares what was right",
         "hand the attack the true labels, not the network's answers"),
    Rule("ADV-025", "steps reach the border", attacks.can_reach,
         "steps * step_size < eps: the budget stated is not the one used",
         "use more steps or larger ones; 2.5 * eps / steps is usual"),
    Rule("ADV-026", "no weaker than ours", attacks.no_weaker_than_ours,
         "the attacks chosen leave images that simple ones break, so the figure says how weak they are",
         "attack as `secateur attack` does by default, with more steps or restarts, or with AutoAttack"),
    Rule("ADV-030", "many steps beat one", attacks.one_step_no_better,
         "the gradient misleads away from the image: a masked gradient, or steps far too large",
         "attack with restarts, another loss, bpda, square"),
    Rule("ADV-031", "PGD near the union", attacks.union_adds_little,
         "PGD alone overstates robustness",
         "quote the union over all attacks"),
    Rule("ADV-032", "twice the steps", attacks.twice_the_steps,
         "the attack has not converged",
         "double the steps until nothing changes"),
    Rule("ADV-033", "losses agree", attacks.losses_agree,
         "one loss misleads, as cross-entropy does where logits are far too large",
         "attack with both losses, and quote the union"),
    Rule("ADV-034", "better than noise", attacks.better_than_noise,
         "the gradient is worth nothing",
         "attack with `forward=bpda(twin)` or eot, and with square"),
    Rule("ADV-035", "square adds nothing", attacks.square_no_better,
         "an attack without gradients finds what white-box attacks miss: the gradient is masked",
         "attack with `forward=bpda(twin)`; count the images listed as broken"),
    Rule("ADV-036", "transfer adds nothing", attacks.transfer_no_better,
         "another network's gradient finds what the network's own misses: the gradient is masked",
         "attack with `forward=bpda(surrogate)`; count the images listed as broken"),
    Rule("ADV-037", "larger eps breaks more", attacks.sweep_is_monotone,
         "the attack loses its way at larger budgets",
         "use more steps and restarts at each budget"),
    Rule("ADV-038", "large eps reaches chance", attacks.far_reaches_chance,
         "the attack fails where it cannot fail, so at eps it may fail too",
         "attack with another loss, bpda, square"),
    Rule("ADV-040", "unseen images", network.unseen,
         "robustness on training images is not robustness",
         "measure on test images; pass `train` to have it counted"),
    Rule("ADV-041", "enough images", network.enough,
         "the interval is too wide to say anything",
         "use more images"),
)  # fmt: skip
