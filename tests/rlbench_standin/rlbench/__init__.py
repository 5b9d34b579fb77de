"""Stands in for RLBench 1.2: its public classes and method names, over a toy, not CoppeliaSim.

The toy: a Panda (kinematics after Franka's published URDF, joint 4's zero as in RLBench) whose
joints go where they are sent, and a goal posture to be reached. It is strict about arguments and
shapes, and lets through what RLBench lets through. Conventions are PyRep's: poses in the room's
frame, quaternions with w last, a joint's pose before it turns, negative focal lengths.
"""
