"""RLBench live where the simulator fails, scenes are hard to lay out, or options are impossible."""

import numpy as np
import pytest
import test_evaluate
from test_rlbench import (
    CAMERAS,
    SIZE,
    Staying,
    dumps,
    load,
    only,
    rlbench_settings,
    simulator,
    write_dataset,
)
from test_rlbench import no_simulator_left as no_simulator_left  # a fixture

from genima.files import UserError
from genima.report import summarise
from sims.rlbench_panda import NoSceneError, RLBenchEnv
from sims.rlbench_protocol import PAPER_PROTOCOL, Protocol


def failing_seed(env):
    """The first seed in whose scene the simulator fails, and how."""
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        for _ in range(5):
            try:
                env.step(np.append(observation["qpos"][:7], 1))
            except RuntimeError as error:
                return seed, error
    raise AssertionError("no scene fails")


def test_a_failing_simulator_goes_through_and_the_next_reset_works():
    env = RLBenchEnv("failing", image_size=16)
    seed, error = failing_seed(env)
    assert "V-REP side" in str(error) and simulator.environment is None
    # The stand-in's simulator fails for ever after, so this is another one.
    observation, info = env.reset(seed=seed)
    assert info["variation"] == env.variation and observation["images"].keys() == set(CAMERAS)
    env.step(np.append(observation["qpos"][:7], 1))


def test_a_failing_simulator_costs_its_episode_alone(tmp_path):
    settings = rlbench_settings(tmp_path, episodes=6, max_steps=5)
    outcomes = []
    for seed in range(6):
        outcomes.append(test_evaluate.drive(Staying(), "failing", seed, settings)[0])
    failed = [outcome for outcome in outcomes if "error" in outcome]
    assert 0 < len(failed) < 6
    for outcome in failed:
        assert outcome["error"].startswith("RuntimeError: The call failed")
        assert not outcome["success"] and "failed_resets" not in outcome
    for outcome in outcomes:
        assert "error" in outcome or outcome["steps"] == 5
    report = summarise(outcomes, [{"paint": [], "control": []}] * 6)
    assert report["errors"] == {failed[0]["error"]: len(failed)}


@pytest.mark.parametrize("variation", [99, -1, 12])
def test_an_impossible_variation_is_called_that(variation):
    env = RLBenchEnv("open_box", image_size=16)
    with pytest.raises(UserError, match=f"variations 0 to 11, and no variation {variation}"):
        env.reset(seed=0, options={"variation": variation})
    with pytest.raises(UserError, match="no variation"):
        RLBenchEnv("open_box", 16, protocol=Protocol(variation=variation)).demonstrate(0)
    env.reset(seed=0, options={"variation": 11})


def test_a_scene_laid_out_at_the_fifth_attempt_comes_back(tmp_path):
    """RLBench draws the scene of a demonstration as often as it took when it was recorded."""
    env = RLBenchEnv("picky", image_size=16)
    env.reset(seed=0)
    demos = simulator.task.get_demos(amount=8, live_demos=True)
    demo = max(demos, key=lambda demo: demo.num_reset_attempts)
    assert demo.num_reset_attempts > 2
    write_dataset(tmp_path)
    path = only(tmp_path) / "low_dim_obs.pkl"
    path.write_bytes(dumps(demo))
    env.reset(seed=5, options={"demonstration": only(tmp_path)})
    assert np.allclose(simulator.task._task.goal, demo[-1].joint_positions)


@pytest.mark.parametrize("position", [-1, 625, 10**9])
def test_a_hostile_random_state_is_refused(tmp_path, position):
    """NumPy would read beyond its state."""
    write_dataset(tmp_path)
    path = only(tmp_path) / "low_dim_obs.pkl"
    content = load(path)
    name, keys, _, has_gauss, gauss = content.random_seed
    for state in ((name, keys, position, has_gauss, gauss), (name, keys[:9], 0, 0, 0.0), 7):
        demo = as_demo(content, state)
        path.write_bytes(dumps(demo))
        with pytest.raises(UserError, match="low_dim_obs.pkl holds no state"):
            RLBenchEnv("reach_target", 16).reset(options={"demonstration": only(tmp_path)})


def as_demo(content, state):
    from rlbench.demo import Demo

    return Demo([], random_seed=state, num_reset_attempts=content.num_reset_attempts)


def test_the_paper_s_way_of_recording(monkeypatch):
    env = RLBenchEnv("reach_target", SIZE, protocol=PAPER_PROTOCOL)
    assert env.demonstrate(7).variation == 0
    environment = simulator.environment
    assert (environment._arm_max_velocity, environment._arm_max_acceleration) == (2.0, 8.0)
    cameras = [getattr(environment._config, f"{camera}_camera") for camera in CAMERAS]
    assert {camera.render_mode.name for camera in cameras} == {"OPENGL"}
    assert PAPER_PROTOCOL.execution_horizon == 20 and PAPER_PROTOCOL.max_steps == 200
    env = RLBenchEnv("reach_target", SIZE)  # RLBench's defaults: another simulator
    env.reset(seed=0)
    assert simulator.environment._arm_max_velocity == 1.0


def test_no_scene_is_told_from_a_failing_simulator():
    with pytest.raises(NoSceneError, match="Could not collect demos"):
        RLBenchEnv("unreachable", 16).demonstrate(0)
    assert simulator.environment is not None
