from rlbench.backend.observation import CAMERAS


class CameraConfig:
    def __init__(self, rgb=True, depth=True, point_cloud=True, mask=True, image_size=(128, 128)):
        self.rgb, self.depth, self.point_cloud, self.mask, self.image_size = (
            rgb,
            depth,
            point_cloud,
            mask,
            image_size,
        )

    def set_all(self, value):
        self.rgb = self.depth = self.point_cloud = self.mask = value


class ObservationConfig:
    LOW = ("joint_velocities", "joint_positions", "joint_forces", "gripper_open", "gripper_pose", "gripper_matrix",
           "gripper_joint_positions", "gripper_touch_forces", "task_low_dim_state")  # fmt: skip

    def __init__(self):
        for camera in CAMERAS:
            setattr(self, f"{camera}_camera", CameraConfig())
        for name in self.LOW:
            setattr(
                self,
                name,
                name
                not in (
                    "gripper_matrix",
                    "gripper_joint_positions",
                    "gripper_touch_forces",
                    "task_low_dim_state",
                ),
            )

    def set_all(self, value):
        for camera in CAMERAS:
            getattr(self, f"{camera}_camera").set_all(value)
        for name in self.LOW:
            setattr(self, name, value)
