"""The scene as people want to see it, and films of it: the whole arm, a sky, soft shadows.

    camera = PeopleCamera(env)
    image = camera.render(snapshot(env))           (480, 640, 3) uint8, the scene as it is now

    recording = Recording()
    rollout(env, policy, seed, watch=recording)    what the policy sees and does stays as it is
    write_people_film(path, task, "mujoco", [(outcome, recording.moments)])
                                                   30 frames a second, in between control steps
    film_demonstrations(...)                       likewise, what the scripted expert does

The images that a policy sees have a quickly drawn arm and no shadows. Here is a second model of the
same scene, which is not simulated: it takes joints, objects and colours from the environment.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

from genima.episodes import CAMERAS
from genima.files import UserError
from genima.parallel import run_in_parallel
from genima.plots import people_frame, write_video
from genima.robots import FRANKA
from sims import make_env
from sims.demonstrator import record_demonstration
from sims.mujoco_panda import CONTROL_HZ, add_camera
from sims.mujoco_tasks import PAINTED
from sims.rendering import new_renderer

HEIGHT = 480  # pixels
WIDTH = 640
FPS = 30  # of a film
SECONDS_AT_END = 1.5  # a film shows how an episode ended for this long
EYE = (1.50, -1.00, 0.90)  # metres, world frame: where the camera stands
LOOK_AT = (0.34, 0.0, 0.29)
FOVY = 38  # degrees
SUN = (1.0, -1.2, 2.4)  # metres, world frame: where the light comes from that casts shadows
VIEW_SIZE = 64  # pixels, of the views beside a demonstration
PAINTED_NAMES = {  # by policy; one that is not listed is a user's own
    "genima": "what the diffusion model paints",
    "oracle": "the true spheres",
    "act": "what ACT sees",
}
ROBOT_GROUP = 2  # the group of the quickly drawn arm's geoms (load_robot)
HIDDEN_GROUP = 4  # a group that MuJoCo does not draw
CELL = 0.006  # metres: the arm's meshes are thinned to one vertex in each cube of this edge


# ----------------------------------------------------------------------------------------- what is
@dataclass
class Snapshot:
    """The state and the look of a scene at one moment, as arrays of MuJoCo."""

    qpos: np.ndarray  # joints of the arm and of the objects
    mocap_pos: np.ndarray
    mocap_quat: np.ndarray
    body_pos: np.ndarray  # where the tasks lay what cannot move
    body_quat: np.ndarray
    colours: dict[str, np.ndarray]  # of each geom that has a name, RGBA
    light: np.ndarray  # (3,) how much of each colour there is; 1 as usual
    robot: str = "fr3"  # whose arm it is (sims/arms.py)


def snapshot(env) -> Snapshot:
    """The scene in an environment (PandaEnv) as it is now."""
    model = env.model
    colours = {}
    for i in range(model.ngeom):
        name = model.geom(i).name
        if name and name != "backdrop":  # the floor is bright for people
            colours[name] = model.geom_rgba[i].copy()
    return Snapshot(
        qpos=env.data.qpos.copy(),
        mocap_pos=env.data.mocap_pos.copy(),
        mocap_quat=env.data.mocap_quat.copy(),
        body_pos=model.body_pos.copy(),
        body_quat=model.body_quat.copy(),
        colours=colours,
        light=model.light_diffuse[0].copy(),
        robot=env.robot,
    )


# ------------------------------------------------------------------------------------------ camera
class PeopleCamera:
    """A camera at three quarters, in a second model of the environment's scene."""

    def __init__(self, env, height: int = HEIGHT, width: int = WIDTH):
        spec = env.build()
        if env.robot in FRANKA:
            add_visual_arm(spec)
        add_surroundings(spec)
        add_camera(spec.worldbody, "people", EYE, LOOK_AT, FOVY)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.usual_light = self.model.light_diffuse.copy()
        self.usual_ambient = self.model.vis.headlight.ambient.copy()
        self.env_light = self.usual_light[0].copy()
        self.renderer = new_renderer(self.model, height, width)

    def render(self, moment: Snapshot) -> np.ndarray:
        """The scene of a snapshot: (height, width, 3) uint8."""
        model = self.model
        self.data.qpos[:] = moment.qpos
        self.data.mocap_pos[:] = moment.mocap_pos
        self.data.mocap_quat[:] = moment.mocap_quat
        model.body_pos[:] = moment.body_pos
        model.body_quat[:] = moment.body_quat
        for name, colour in moment.colours.items():
            model.geom(name).rgba[:] = colour
        strength = moment.light / self.env_light
        model.light_diffuse[:] = self.usual_light * strength
        model.vis.headlight.ambient[:] = self.usual_ambient * strength
        mujoco.mj_kinematics(model, self.data)
        mujoco.mj_comPos(model, self.data)
        mujoco.mj_camlight(model, self.data)
        self.renderer.update_scene(self.data, "people")
        return self.renderer.render()

    def close(self):
        self.renderer.close()


def add_visual_arm(spec):
    """Put the arm's visual meshes over the quickly drawn ones, which are hidden."""
    for geom in spec.geoms:
        if geom.group == ROBOT_GROUP:
            geom.group = HIDDEN_GROUP
    assets = Path(find_spec("franky_sim").origin).parent / "assets"
    robot = mujoco.MjSpec.from_file(str(assets / "fr3.xml"))
    robot.meshdir = str(assets / "meshes")
    compiled = robot.compile()
    added = set()
    for geom in robot.geoms:
        if geom.classname.name != "visual":
            continue
        name = f"visual_{geom.meshname}"
        if name not in added:
            added.add(name)
            vertices, faces = mesh_of(compiled, geom.meshname)
            cell = min(CELL, np.ptp(vertices, axis=0).max() / 30)  # small parts stay whole
            vertices, faces = thin_out(vertices, faces, cell)
            spec.add_mesh(
                name=name,
                uservert=vertices.ravel(),
                userface=faces.ravel(),
                inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL,
            )
        spec.body(geom.parent.name).add_geom(
            type=mujoco.mjtGeom.mjGEOM_MESH,
            meshname=name,
            material=geom.material,
            pos=geom.pos,
            quat=geom.quat,
            mass=0,
            **PAINTED,
        )


def mesh_of(model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (N, 3), metres, and faces (M, 3) of a compiled mesh, where its file has them."""
    mesh = model.mesh(name)
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, model.mesh_quat[mesh.id])
    first = model.mesh_vertadr[mesh.id]
    vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh.id]]
    first = model.mesh_faceadr[mesh.id]
    faces = model.mesh_face[first : first + model.mesh_facenum[mesh.id]]
    # MuJoCo has moved the mesh to its centre of mass and turned it to its axes of inertia.
    return vertices @ rotation.reshape(3, 3).T + model.mesh_pos[mesh.id], faces


def thin_out(vertices: np.ndarray, faces: np.ndarray, cell: float):
    """A mesh with one vertex, the mean, in each cube of edge `cell`: (N, 3), (M, 3) int32.

    The arm has 240,000 faces, thinned out 30,000: it draws three times faster and looks the same.
    """
    cubes = np.floor(vertices / cell).astype(np.int64)
    _, cube_of, counts = np.unique(cubes, axis=0, return_inverse=True, return_counts=True)
    cube_of = cube_of.ravel()
    means = np.zeros((len(counts), 3))
    np.add.at(means, cube_of, vertices)
    means /= counts[:, None]
    thinned = np.sort(cube_of[faces], axis=1)
    is_flat = (thinned[:, 0] == thinned[:, 1]) | (thinned[:, 1] == thinned[:, 2])
    _, once = np.unique(thinned, axis=0, return_index=True)  # of faces that fell together, one
    kept = np.intersect1d(once, np.flatnonzero(~is_flat))
    return means, cube_of[faces[kept]].astype(np.int32)


def add_surroundings(spec):
    """A sky, a bright floor, and a sun that casts shadows."""
    sky = spec.texture("sky")
    sky.rgb1 = (0.55, 0.67, 0.82)
    sky.rgb2 = (0.93, 0.95, 0.98)
    sky.width = 128
    sky.height = 6 * sky.width
    spec.geom("backdrop").rgba = (0.80, 0.83, 0.86, 1)
    spec.visual.headlight.ambient = (0.46, 0.46, 0.46)
    spec.visual.headlight.diffuse = (0.15, 0.15, 0.15)
    spec.visual.quality.shadowsize = 1024
    direction = np.subtract(LOOK_AT, SUN)
    spec.worldbody.add_light(pos=SUN, dir=direction, castshadow=True, diffuse=(0.45, 0.45, 0.45))


# ------------------------------------------------------------------------------------------- films
@dataclass
class Moment:
    """What there was to see at one control step."""

    scene: Snapshot
    painted: dict[str, np.ndarray]  # {camera: (h, w, 3) uint8}
    sentence: str


@dataclass
class Recording:
    """An episode's moments. It is the `watch` of rollout, and small enough to be returned."""

    moments: list[Moment] = field(default_factory=list)

    def __call__(self, env, painted: dict[str, np.ndarray], sentence: str):
        """painted: shown beside the scene."""
        self.moments.append(Moment(snapshot(env), painted, sentence))


def film_frames(
    camera: PeopleCamera,
    moments: list[Moment],
    success: bool | None,
    painted_name: str,
    verdict: str | None = None,
) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) of one episode, FPS a second; between control steps the arm moves on.

    success: shown at the end for SECONDS_AT_END; None: unknown, the end is not held. verdict: what
    is written there.
    """
    for i in range(round((len(moments) - 1) * FPS / CONTROL_HZ)):
        step, fraction = divmod(i * CONTROL_HZ / FPS, 1)
        now = moments[int(step)]
        scene = between(camera.model, now.scene, moments[int(step) + 1].scene, fraction)
        yield people_frame(camera.render(scene), now.painted, now.sentence, painted_name)
    last = moments[-1]
    scene = camera.render(last.scene)
    frame = people_frame(scene, last.painted, last.sentence, painted_name, success, verdict)
    held = 1 if success is None else round(SECONDS_AT_END * FPS)
    for _ in range(held):
        yield frame


def between(model, scene: Snapshot, following: Snapshot, fraction: float) -> Snapshot:
    """The scene a fraction (0..1) of the way from one snapshot to the next."""
    velocity = np.zeros(model.nv)
    mujoco.mj_differentiatePos(model, velocity, 1, scene.qpos, following.qpos)
    qpos = scene.qpos.copy()
    mujoco.mj_integratePos(model, qpos, velocity, fraction)
    return replace(scene, qpos=qpos)


def write_people_film(
    path: Path,
    task: str,
    sim: str,
    films: list[tuple[dict, list[Moment]]],
    painted_name: str = PAINTED_NAMES["genima"],
):
    """Episodes of a task one after the other, for people.

    sim: "mujoco", or a perturbation. films: (outcome, moments) of each. An outcome says "success",
    and may have a "verdict", which is written at the end.
    """
    first = films[0][1][0].scene
    camera = PeopleCamera(make_env(task, VIEW_SIZE, (), sim, robot=first.robot))

    def frames():
        for outcome, moments in films:
            yield from film_frames(
                camera, moments, outcome["success"], painted_name, outcome.get("verdict")
            )

    write_video(path, frames(), FPS)
    camera.close()


def write_people_films(settings, name: str, episodes: dict):
    """<task>_people.mp4 of each task whose logs have "moments"; several processes draw.

    settings: evaluate.py's. name, episodes: as for genima/report.py's write_results.
    """
    suffix = name.removeprefix("evaluation")
    painted_name = PAINTED_NAMES.get(settings.policy, "what the policy sees")
    jobs = []
    for task, pairs in episodes.items():
        films = [(outcome, log["moments"]) for outcome, log in pairs if log.get("moments")]
        if films:
            path = settings.out / f"{task}{suffix}_people.mp4"
            sim = settings.perturb if settings.perturb else "mujoco"
            jobs.append((write_people_film, path, task, sim, films, painted_name))
    draw_films(jobs, settings.workers)


def film_attempts(path: Path, task: str, attempts: list[tuple[int, int, str]], robot: str = "fr3"):
    """The scripted expert's attempts at a task in one film, each with what became of it.

    attempts: (seed, variation, start) of each, as record_demonstration takes them; the same three
    give the same motion, bit for bit.
    """
    env = make_env(task, VIEW_SIZE, CAMERAS, images=True, robot=robot)
    films = []
    for seed, variation, start in attempts:
        recording = Recording()
        verdict = "failed: not done when the motion ended"
        try:
            success = record_demonstration(env, task, seed, variation, start, recording).success
        except UserError as error:
            success = False
            verdict = f"failed: {error}"
        if success:
            verdict = "done"
        outcome = {"success": success, "verdict": f"scene {seed}: {verdict}"}
        films.append((outcome, recording.moments))
    write_people_film(path, task, "mujoco", films, "what the cameras record")


def film_demonstrations(
    folder: Path, tried: list[tuple], count: int, workers: int, robot: str = "fr3"
):
    """<folder>/<task>.mp4: the first successes, then the first failures, `count` of each.

    tried: (task, seed, variation, start, whether it failed) of each attempt. robot: whose arm.
    """
    chosen = {}  # task -> attempts
    for failure in (False, True):
        for task in dict.fromkeys(attempt[0] for attempt in tried):
            alike = [one[1:4] for one in tried if one[0] == task and one[4] == failure]
            chosen.setdefault(task, []).extend(alike[:count])
    jobs = [(film_attempts, folder / f"{task}.mp4", task, chosen[task], robot) for task in chosen]
    draw_films(jobs, workers)


def draw_films(jobs: list[tuple], workers: int):
    """Run jobs that each write a film, and say where the films are."""
    if not jobs:
        return
    for job, _ in run_in_parallel(jobs, workers, "films", "film"):
        print(f"A film for people: {job[1]}")
