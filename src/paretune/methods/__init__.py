"""Methods: which trainings are needed, and how they and a preference become a family. One file each."""
