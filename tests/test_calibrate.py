"""calibrate.py: cameras are found where they are, files are kept, and what a person can get wrong is one sentence."""

import csv

import cv2
import numpy as np
import pytest
import yaml
from conftest import look_at, make_episode
from PIL import Image
from test_episodes import stage

import calibrate
from calibrate import Settings, arm_chain, fit_camera, make_board
from episodes import write_episode
from render_spheres import load_calibration

INTRINSICS = np.array([[615.0, 0, 322], [0, 613, 237], [0, 0, 1]])
SIZE = (480, 640)
REST = np.array([0.0, -0.3, 0.0, -2.2, 0.0, 1.9, 0.7853])
CHAIN = arm_chain()


def scene(random, on_arm, views=20, settings=Settings()):
    """Random arm positions in which the whole board is in view -> q (T, 7), world_from_last (T, 4, 4), camera, board, to_camera.

    camera and board as in `fit_camera`; to_camera (T, 4, 4) is camera from board.
    """
    corners = make_board(settings).getChessboardCorners().astype(float)  # (M, 3)
    middle = np.append(corners.mean(0), 1)
    rest = CHAIN.joint_poses(REST)[-2]
    if on_arm:  # beside the hand, looking along it; the board lies on the table
        camera = look_at((0.08, 0.02, 0.03), (0.03, 0, 0.6)) @ calibrate.pose_of(random.normal(0, 0.1, 6) * [1, 1, 1, 0.1, 0.1, 0.1])
        board = calibrate.pose_of(np.append([np.pi, 0, 0], rest[:3, 3] * [1, 1, 0]))  # its z axis points down
        board = board @ calibrate.pose_of(np.append(random.normal(0, 0.1, 3), -middle[:3]))
    else:  # in front of the arm; the gripper holds the board towards it
        camera = look_at(random.normal((1.1, 0, 0.6), 0.05), rest[:3, 3]) @ calibrate.pose_of(np.append(random.normal(0, 0.1, 3), [0, 0, 0]))
        board = np.linalg.inv(rest) @ camera @ calibrate.pose_of(np.append(random.normal(0, 0.1, 3), [0, 0, 0.45]))
        board = board @ calibrate.pose_of(np.append([0, 0, 0], -middle[:3]))
    kept = []
    while len(kept) < views:
        q = REST + random.uniform(-0.5, 0.5, 7)
        last = CHAIN.joint_poses(q)[-2]
        to_camera = np.linalg.inv(last @ camera) @ board if on_arm else np.linalg.inv(camera) @ last @ board
        here = np.c_[corners, np.ones(len(corners))] @ to_camera[:3].T
        pixels = project(to_camera, corners)
        facing = -to_camera[:3, 2] @ to_camera[:3, 3] / np.linalg.norm(to_camera[:3, 3])
        if here[:, 2].min() > 0.15 and facing < -0.6 and pixels.min() > 25 and (pixels < np.array(SIZE[::-1]) - 25).all():
            kept.append((q, last, to_camera))
    q, last, to_camera = map(np.array, zip(*kept))
    return q, last, camera, board, to_camera


def project(to_camera, points):
    here = points @ to_camera[:3, :3].T + to_camera[:3, 3]
    return here[:, :2] / here[:, 2:] * INTRINSICS[[0, 1], [0, 1]] + INTRINSICS[:2, 2]


def apart(pose, other):
    """Metres and degrees between two poses."""
    difference = np.linalg.inv(pose) @ other
    return np.linalg.norm(difference[:3, 3]), np.degrees(np.linalg.norm(cv2.Rodrigues(difference[:3, :3])[0]))


@pytest.mark.parametrize("on_arm", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_within_a_millimetre_with_noise_of_a_third_of_a_pixel(on_arm, seed):
    random = np.random.default_rng(seed)
    _, last, camera, board, to_camera = scene(random, on_arm)
    points = make_board(Settings()).getChessboardCorners().astype(float)
    found = [(np.arange(len(points)), project(pose, points) + random.normal(0, 0.3, (len(points), 2))) for pose in to_camera]
    fit = fit_camera(found, points, last, SIZE, on_arm, 0.03, list(range(20)))
    metres, degrees = apart(camera, fit.camera)
    print(metres, degrees, fit)
    assert metres < 1e-3 and degrees < 0.2
    assert 0.35 < fit.lens_error < 0.5 and 0.35 < fit.arm_error < 0.5
