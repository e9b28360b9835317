"""The table "what happened, what to do, what is lost" of docs/resume.md: every line of it is held by a test."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs/resume.md").read_text().split("| what happened |")[1].split("\n\n")[0]

# the first column, and the tests; of those that stand together the later ones are slow, and closer to life
HELD = {
    "Ctrl-C, SIGTERM, SIGUSR1, SIGHUP (a terminal or a connection that is closed)": [
        "test_resume.test_a_signal_saves_and_says_how_to_go_on"
    ],
    "Ctrl-C again, more than a second later": [
        "test_watch.test_a_second_interrupt_ends_the_run",
        "test_watch.test_a_second_interrupt_ends_a_process_that_hangs",
    ],
    "SIGKILL, a crash, no power": ["test_resume.test_a_killed_process_continues_bit_for_bit"],
    "the newest checkpoint is damaged": ["test_resume.test_a_damaged_newest_checkpoint_gives_way_to_the_one_before"],
    "all checkpoints are damaged or gone": ["test_resume.test_a_run_without_readable_checkpoints_is_not_trained_anew"],
    "a checkpoint has no `.sha256` file": ["test_resume.test_a_checkpoint_without_its_digest_is_said"],
    "the disk is full or may not be written to": [
        "test_failures.test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before",
        "test_failures.test_what_the_disk_refuses_is_said_with_its_remedy",
    ],
    "`checkpoints/` was removed while the run goes on": [
        "test_failures.test_a_folder_of_checkpoints_that_is_gone_is_made_again"
    ],
    "the command was started twice": ["test_resume.test_two_processes_do_not_train_in_one_folder"],
    "one of several processes was killed": ["test_processes.test_when_one_is_killed_the_other_stops_with_a_line"],
    "a process is stopped, or its machine is gone": [
        "test_watch.test_a_process_that_stands_still_is_named",
        "test_watch.test_a_process_that_is_silent_is_named",
        "test_watch.test_a_process_that_is_stopped_is_named",
        "test_watch.test_a_machine_that_is_gone_is_noticed",
    ],
    "an image, a step or a write takes for ever": [
        "test_watch.test_an_image_that_takes_for_ever_is_named",
        "test_watch.test_whoever_seems_to_hang_is_looked_at_again",
        "test_watch.test_a_lock_that_is_never_given_back",
    ],
    "`/dev/shm` has no room (a container's 64 MB)": ["test_watch.test_shared_memory_that_is_too_small_is_one_line"],
    "an image cannot be read": ["test_failures.test_a_run_that_met_a_broken_image_goes_on_when_told_to_skip"],
    "losses or weights are not finite": [
        "test_failures.test_steps_that_are_skipped_replace_no_checkpoint",
        "test_failures.test_the_last_step_cannot_poison_the_checkpoint",
    ],
    "out of GPU memory": [
        "test_failures.test_a_gpu_that_is_too_small_is_one_line_and_the_run_goes_on_with_smaller_batches"
    ],
    "another number of GPUs": ["test_processes.test_a_run_goes_on_with_another_number_of_processes"],
    "other images than before, by their names": ["test_resume.test_other_images_are_refused_unless_forced"],
    "the run should be longer": ["test_resume.test_forced_to_go_on_with_another_recipe"],
    "the run is finished": [
        "test_resume.test_a_finished_run_resumes_to_its_report",
        "test_resume.test_a_finished_run_without_checkpoints_is_evaluated",
    ],
}


def test_every_line_of_the_table_has_its_test() -> None:
    lines = re.findall(r"^\| (?!what happened|-)(.*?) \|", TABLE, flags=re.MULTILINE)
    assert lines == [*HELD]
    for name in itertools.chain(*HELD.values()):
        file, test = name.split(".")
        assert f"\ndef {test}(" in (TESTS / f"{file}.py").read_text(), name
