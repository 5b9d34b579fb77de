from pyrep.const import RenderMode

from rlbench.backend.observation import CAMERAS


class CameraConfig:
    def __init__(
        self,
        rgb=True,
        depth=True,
        point_cloud=True,
        mask=True,
        image_size=(128, 128),
        render_mode=RenderMode.OPENGL3,
    ):
        self.rgb = rgb
        self.depth = depth
        self.point_cloud = point_cloud
        self.mask = mask
        self.image_size = image_size
        self.render_mode = render_mode

    def set_all(self, value):
        self.rgb = self.depth = self.point_cloud = self.mask = value


class ObservationConfig:
    ON = ("joint_velocities", "joint_positions", "joint_forces", "gripper_open", "gripper_pose")
    OFF = (
        "gripper_matrix",
        "gripper_joint_positions",
        "gripper_touch_forces",
        "task_low_dim_state",
    )

    def __init__(self):
        for camera in CAMERAS:
            setattr(self, f"{camera}_camera", CameraConfig())
        for name in self.ON + self.OFF:
            setattr(self, name, name in self.ON)

    def set_all(self, value):
        for camera in CAMERAS:
            getattr(self, f"{camera}_camera").set_all(value)
        for name in self.ON + self.OFF:
            setattr(self, name, value)
