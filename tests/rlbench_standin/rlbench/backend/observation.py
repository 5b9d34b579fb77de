CAMERAS = ("left_shoulder", "right_shoulder", "overhead", "wrist", "front")
FIELDS = [f"{camera}_{what}" for camera in CAMERAS for what in ("rgb", "depth", "mask")]
FIELDS += [f"{camera}_point_cloud" for camera in CAMERAS]
FIELDS += ["joint_velocities", "joint_positions", "joint_forces", "gripper_open", "gripper_pose"]
FIELDS += ["gripper_matrix", "gripper_joint_positions", "gripper_touch_forces"]
FIELDS += ["task_low_dim_state", "misc"]


class Observation:
    def __init__(self, **fields):
        assert set(fields) == set(FIELDS), set(fields) ^ set(FIELDS)
        self.__dict__.update(fields)


class UnimanualObservation:
    """As in the fork of PerAct2."""


class BimanualObservation:
    """As in the fork of PerAct2."""
