"""Painter and controller as one policy, and its rollout."""

import numpy as np

from genima.spheres import alpha_composite, draw_spheres, target_spheres


class Oracle:
    """Paints the true spheres of a demonstration, which it follows by progress: a clock would run away from a slow controller."""

    def __init__(self, demo, horizon):
        self.demo = demo
        self.horizon, self.frame = horizon, -1

    def progress(self, joints):
        """The demonstration's frame nearest to these joints (D,), at least one further than the last time."""
        # No further than a chunk: a hand that goes down and up again passes the same place twice.
        ahead = np.minimum(
            np.arange(self.frame + 1, self.frame + self.horizon + 1), len(self.demo.qpos) - 1
        )
        distance = np.linalg.norm(self.demo.qpos[ahead, :-1] - joints, axis=1)
        self.frame = int(ahead[np.argmin(distance)])
        return self.frame

    def paint(self, env, images, frame):
        """The spheres of `horizon` steps after this frame, over what the cameras see now."""
        frame = min(frame + self.horizon, len(self.demo.qpos) - 1)
        painted = {}
        for camera, image in images.items():
            spheres = target_spheres(
                self.demo.joint_poses[frame], self.demo.action[frame, -1] > 0.5, camera
            )
            painted[camera] = alpha_composite(
                draw_spheres(*spheres, *env.camera_parameters(camera), *image.shape[:2]), image
            )
        return painted
