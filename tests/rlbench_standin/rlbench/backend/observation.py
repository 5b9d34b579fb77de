CAMERAS = ("left_shoulder", "right_shoulder", "overhead", "wrist", "front")
FIELDS = [f"{camera}_{what}" for camera in CAMERAS for what in ("rgb", "depth", "mask", "point_cloud")] + [
    "joint_velocities", "joint_positions", "joint_forces", "gripper_open", "gripper_pose", "gripper_matrix",
    "gripper_joint_positions", "gripper_touch_forces", "task_low_dim_state", "misc",
]  # fmt: skip


class Observation:
    def __init__(self, **fields):
        assert set(fields) == set(FIELDS), set(fields) ^ set(FIELDS)
        self.__dict__.update(fields)
